//! The checksum of a device's whole stream, made of its frames'.

use crc32fast::Hasher;

/// CRC-32 of everything so far.
#[derive(Clone, Debug, Default)]
pub(crate) struct StreamChecksum(Hasher);

impl StreamChecksum {
    /// The stream goes on with `data`, whose own checksum is `known` where a frame carried it: then the bytes are
    /// not looked at again.
    pub(crate) fn push(&mut self, data: &[u8], known: Option<u32>) {
        match known {
            Some(crc) => self.0.combine(&Hasher::new_with_initial_len(crc, data.len() as u64)),
            None => self.0.update(data),
        }
    }

    pub(crate) fn value(&self) -> u32 {
        self.0.clone().finalize()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_with_and_without_a_checksum_add_up_to_that_of_the_whole() {
        let stream: Vec<u8> = (0..100_000u32).map(|i| (i.wrapping_mul(i) >> 7) as u8).collect();
        let mut checksum = StreamChecksum::default();
        let mut rest = &stream[..];
        for (turn, len) in [1, 0, 4096, 70_000, 3, 25_900].into_iter().enumerate() {
            let (data, after) = rest.split_at(len);
            checksum.push(data, (turn % 2 == 0).then(|| crc32fast::hash(data)));
            rest = after;
            let so_far = &stream[..stream.len() - rest.len()];
            assert_eq!(checksum.value(), crc32fast::hash(so_far), "after {} bytes", so_far.len());
        }
        assert!(rest.is_empty());
        checksum.push(b"x", Some(crc32fast::hash(b"y")));
        let whole = [&stream[..], b"x"].concat();
        assert_ne!(checksum.value(), crc32fast::hash(&whole), "what a frame says is believed");
    }
}
