//! The device in numbers says what the device with bytes says, along any history of a migration.

use device_model::core::CoreOptions;
use device_model::counted::CountedRead;
use device_model::{CountedDevice, DeviceCore, GuestDma, Profile, Quirks, RawRead, Timing};
use vfio_migration::DeviceState;

struct NoDma;
impl GuestDma for NoDma {
    fn write(&mut self, _: u64, _: &[u8]) -> Result<(), device_model::DmaFault> {
        Ok(())
    }
}

struct Both {
    bytes: DeviceCore,
    counted: CountedDevice,
    session: Option<device_model::Session>,
    now_ns: u64,
    read_bytes: u64,
    read_counted: u64,
}

impl Both {
    fn new(name: &str) -> Self {
        let profile = Profile::builtin(name).unwrap().scaled_to(32 << 20);
        let quirks = Quirks::from_names(profile.deviations.iter().map(|d| &d.value)).unwrap();
        let timing = Timing::of_profile(&profile);
        let options = CoreOptions {
            profile: profile.clone(),
            quirks: quirks.clone(),
            timing: timing.clone(),
        };
        let mut bytes = DeviceCore::new(options).unwrap();
        if bytes.offers_precopy_info_v2() {
            bytes.opt_in_precopy_info_v2().unwrap();
        }
        let counted = CountedDevice::new(&profile, quirks, timing);
        Self { bytes, counted, session: None, now_ns: 0, read_bytes: 0, read_counted: 0 }
    }

    fn set(&mut self, target: DeviceState) {
        let outcome = self.bytes.set_state(target, self.now_ns).unwrap();
        self.session = outcome.session.or(self.session);
        let took = self.counted.set_state(target, self.now_ns, |one_in| one_in == 1);
        assert_eq!((took, self.counted.state()), (Some(outcome.took_ns), self.bytes.state()));
    }

    /// Frames of the stream cost bytes that are not counted.
    fn close(&self, what: &str, bytes: u64, counted: u64) {
        let slack = counted / 50 + (64 << 10);
        assert!(bytes.abs_diff(counted) <= slack, "{what}: {bytes} and {counted} counted");
    }

    fn compare(&mut self) {
        if self.bytes.state().is_precopy() {
            let info = self.bytes.precopy_info(self.now_ns);
            let counted = self.counted.info(self.now_ns);
            assert_eq!(info.is_ok(), counted.is_some());
            if let (Ok(info), Some(counted)) = (info, counted) {
                assert_eq!(info.reinit(), counted.reinit);
                self.close("initial", info.initial_bytes(), counted.initial_bytes);
                self.close("dirty", info.dirty_bytes(), counted.dirty_bytes);
            }
        }
        let (bytes, counted) = (self.bytes.stop_copy_length(), self.counted.stop_copy_length());
        self.close("stop-copy", bytes.unwrap(), counted.unwrap());
    }

    /// Reads both dry.
    fn drain(&mut self) {
        let mut buffer = vec![0; 1 << 20];
        let session = self.session.unwrap();
        for _ in 0..10_000 {
            match self.bytes.read(session, &mut buffer, self.now_ns).unwrap() {
                RawRead::Data(len) => self.read_bytes += len as u64,
                _ => break,
            }
        }
        for _ in 0..10_000 {
            match self.counted.read(u64::MAX, self.now_ns) {
                CountedRead::Data(len) => self.read_counted += len,
                _ => break,
            }
        }
        self.close("read", self.read_bytes, self.read_counted);
    }

    fn register(&mut self, offset: u64, value: u32) {
        let region = vfio_migration::pci::REGION_BAR0;
        let data = value.to_le_bytes();
        self.bytes.region_write(region, offset, &data, self.now_ns, &mut NoDma).unwrap();
    }

    fn fill(&mut self, kib: u32) {
        self.register(device_model::regs::FILL_KIB, kib);
        self.counted.dirty(u64::from(kib) * 1024);
    }

    fn reconfigure(&mut self, kib: u32) {
        self.register(device_model::regs::CONFIG_KIB, kib);
        self.register(device_model::regs::CONFIG_GEN, self.now_ns as u32 | 1);
        self.counted.reconfigure(u64::from(kib) * 1024);
    }
}

#[test]
fn sizes_announcements_and_times_agree_along_a_migration() {
    for name in ["mlx5-vf", "mlx5-vf-cx7-heavy", "virtio-vf", "qat", "pds", "xe-vf", "vgpu-precopy"]
    {
        let mut both = Both::new(name);
        both.compare();
        if both.bytes.capabilities().flags.pre_copy() {
            both.set(DeviceState::PreCopy);
            both.compare();
            // The second round has everything planned that asking plans.
            for _ in 0..2 {
                both.drain();
                both.compare();
            }
            both.drain();
            both.now_ns += 2_000_000_000;
            both.fill(1024);
            both.compare();
            both.drain();
            both.reconfigure(2048);
            both.compare();
            both.drain();
            both.compare();
            both.fill(512);
            if both.bytes.capabilities().flags.p2p() {
                both.set(DeviceState::PreCopyP2p);
                both.set(DeviceState::PreCopy);
                both.compare();
                both.set(DeviceState::PreCopyP2p);
            }
        }
        both.set(DeviceState::StopCopy);
        both.compare();
        both.drain();
        both.set(DeviceState::Running);
        both.compare();
    }
}
