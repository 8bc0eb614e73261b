//! DMA logging.

use vfio_migration::DmaRange;

use super::{Answer, Context, Stop, not_applicable, skip};

impl Context {
    /// Not applicable to a device that does not log.
    pub fn need_logging(&mut self) -> Result<(), Stop> {
        match self.shape()?.logging {
            true => Ok(()),
            false => not_applicable("the device does not log its DMA"),
        }
    }

    /// DMA_LOGGING_START; answers the page size in use.
    pub fn log_start(&mut self, page_size: u64, ranges: &[DmaRange]) -> Answer<u64> {
        let name = "DMA_LOGGING_START";
        let answer = self.call(name, |subject| subject.logging_start(page_size, ranges))?;
        self.logging |= answer.is_ok();
        Ok(answer)
    }

    /// Starts logging where a rule needs it and is not about that.
    pub fn need_log(&mut self, ranges: &[DmaRange]) -> Result<u64, Stop> {
        match self.log_start(4096, ranges)? {
            Ok(used) => Ok(used),
            Err(errno) => skip(format!("DMA_LOGGING_START failed: {errno} (rule L1)")),
        }
    }

    /// DMA_LOGGING_REPORT into a bitmap that is large enough and holds `before`.
    pub fn log_report(&mut self, range: DmaRange, page_size: u64, before: u64) -> Answer<Vec<u64>> {
        // Room for every bit that a malformed page size could mean; ranges of rules are small.
        let words = range.length.div_ceil(page_size.max(1)).div_ceil(64);
        let mut bitmap = vec![before; words.clamp(1, 1 << 16) as usize];
        let name = "DMA_LOGGING_REPORT";
        let answer =
            self.call(name, |subject| subject.logging_report(range, page_size, &mut bitmap))?;
        Ok(answer.map(|()| bitmap))
    }

    /// DMA_LOGGING_STOP.
    pub fn log_stop(&mut self) -> Answer<()> {
        let answer = self.call("DMA_LOGGING_STOP", |subject| subject.logging_stop())?;
        self.logging &= answer.is_err();
        Ok(answer)
    }
}
