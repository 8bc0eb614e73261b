//! Messages as bytes, built without the crate's codec, and servers that follow a script.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread::JoinHandle;

pub const VERSION: u16 = 1;
pub const DEVICE_GET_INFO: u16 = 4;
pub const DEVICE_FEATURE: u16 = 16;
pub const MIG_DATA_READ: u16 = 17;
pub const MIG_DATA_WRITE: u16 = 18;

pub const LIBVFIO_USER_CAPS: &str = r#"{ "capabilities": { "max_msg_fds": 8, "max_data_xfer_size": 1048576, "migration": { "pgsize": 4096 } } }"#;

/// A message as it crossed the socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Msg {
    pub id: u16,
    pub command: u16,
    pub flags: u32,
    pub errno: u32,
    pub payload: Vec<u8>,
}

impl Msg {
    pub fn command(id: u16, command: u16, payload: &[u8]) -> Self {
        Self { id, command, flags: 0, errno: 0, payload: payload.to_vec() }
    }

    pub fn reply(&self, payload: &[u8]) -> Self {
        Self { flags: 1, payload: payload.to_vec(), ..self.clone() }
    }

    pub fn refusal(&self, errno: i32, payload: &[u8]) -> Self {
        Self { flags: 0x21, errno: errno as u32, payload: payload.to_vec(), ..self.clone() }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(self.id.to_ne_bytes());
        out.extend(self.command.to_ne_bytes());
        out.extend((16 + self.payload.len() as u32).to_ne_bytes());
        out.extend(self.flags.to_ne_bytes());
        out.extend(self.errno.to_ne_bytes());
        out.extend(&self.payload);
        out
    }

    pub fn send(&self, stream: &mut UnixStream) {
        stream.write_all(&self.bytes()).unwrap();
    }

    /// The next message; `None` at the end of the stream.
    pub fn receive(stream: &mut UnixStream) -> Option<Self> {
        let mut head = [0; 16];
        match stream.read_exact(&mut head) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return None,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return None,
            Err(error) => panic!("{error}"),
        }
        let (id, command) = (u16_at(&head, 0), u16_at(&head, 2));
        let (size, flags, errno) = (u32_at(&head, 4), u32_at(&head, 8), u32_at(&head, 12));
        let mut payload = vec![0; size as usize - 16];
        stream.read_exact(&mut payload).unwrap();
        Some(Self { id, command, flags, errno, payload })
    }

    pub fn word(&self, at: usize) -> u32 {
        u32_at(&self.payload, at)
    }
}

pub fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_ne_bytes(bytes[at..at + 2].try_into().unwrap())
}

pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// Bytes of `words`.
pub fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// Bytes of hex text, blanks ignored.
pub fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(|b| !b.is_ascii_whitespace()).collect();
    let digits = std::str::from_utf8(&digits).unwrap();
    (0..digits.len())
        .step_by(2)
        .map(|i| u8::from_str_radix(&digits[i..i + 2], 16).unwrap())
        .collect()
}

/// The payload of VERSION with capability text.
pub fn version(caps: &str) -> Vec<u8> {
    let mut payload = Vec::new();
    payload.extend(0u16.to_ne_bytes());
    payload.extend(1u16.to_ne_bytes());
    payload.extend(caps.as_bytes());
    payload.push(0);
    payload
}

/// Connects and negotiates with the capability text.
pub fn connect(path: &Path, caps: &str) -> (UnixStream, Msg) {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(super::PATIENCE)).unwrap();
    Msg::command(1, VERSION, &version(caps)).send(&mut stream);
    let reply = Msg::receive(&mut stream).expect("a reply to VERSION");
    (stream, reply)
}

/// Listens at `path`, takes one client, negotiates as libvfio-user does, says that the device has no
/// regions and interrupts, and runs `script` on whatever comes after that.
pub fn fake_server(
    path: &Path,
    caps: &'static str,
    script: impl FnOnce(UnixStream) + Send + 'static,
) -> JoinHandle<()> {
    let listener = UnixListener::bind(path).unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(super::PATIENCE)).unwrap();
        let hello = Msg::receive(&mut stream).unwrap();
        assert_eq!(hello.command, VERSION);
        hello.reply(&version(caps)).send(&mut stream);
        let info = Msg::receive(&mut stream).unwrap();
        assert_eq!(info.command, DEVICE_GET_INFO);
        info.reply(&words(&[16, 3, 0, 0])).send(&mut stream);
        script(stream);
    })
}

/// Plays the migration features of libvfio-user: flags 5, states as they are set, no extension. What it
/// does not know goes to `other`, which says whether to go on.
pub fn play_libvfio_user(
    mut stream: UnixStream,
    mut other: impl FnMut(&mut UnixStream, &Msg, &mut u32) -> bool,
) {
    let mut state = 2;
    while let Some(msg) = Msg::receive(&mut stream) {
        let flags = if msg.command == DEVICE_FEATURE { msg.word(4) } else { 0 };
        let reply = match (msg.command, flags) {
            (DEVICE_FEATURE, 0x1_0001) => msg.reply(&words(&[16, 0x1_0001, 5, 0])),
            (DEVICE_FEATURE, 0x1_0002) => msg.reply(&words(&[16, 0x1_0002, state, 0])),
            (DEVICE_FEATURE, 0x2_0002) => {
                state = msg.word(8);
                msg.reply(&msg.payload)
            }
            // Probes of logging.
            (DEVICE_FEATURE, 0x6_0006 | 0x6_0007 | 0x5_0008) => msg.reply(&msg.payload),
            (DEVICE_FEATURE, 0x5_0009 | 0x6_000c) => msg.refusal(libc::EINVAL, &[]),
            _ => {
                if other(&mut stream, &msg, &mut state) {
                    continue;
                }
                return;
            }
        };
        reply.send(&mut stream);
    }
}
