//! The machine's name: without it, numbers are worth nothing.

use serde::Serialize;

/// What the numbers were measured on.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Host {
    /// Processor, as it calls itself.
    pub cpu: String,
    /// Number of CPUs this process may use.
    pub cpus: usize,
    /// RAM in GiB.
    pub memory_gib: u64,
    /// Release of the kernel.
    pub kernel: String,
    /// It is a virtual machine itself.
    pub virtual_machine: bool,
}

impl Host {
    /// This machine.
    pub fn here() -> Self {
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        let (info, memory) = (read("/proc/cpuinfo"), read("/proc/meminfo"));
        let cpu = field(&info, "model name").unwrap_or("unknown processor");
        let flags = field(&info, "flags").unwrap_or_default();
        let kib = field(&memory, "MemTotal").and_then(|text| text.split(' ').next()?.parse().ok());
        let family = field(&info, "cpu family").unwrap_or("?");
        let model = field(&info, "model").unwrap_or("?");
        Self {
            cpu: format!("{cpu} (family {family}, model {model})"),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory_gib: kib.map_or(0, |kib: u64| kib.div_ceil(1 << 20)),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            virtual_machine: flags.split(' ').any(|flag| flag == "hypervisor"),
        }
    }
}

impl std::fmt::Display for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { cpu, cpus, memory_gib, kernel, virtual_machine } = self;
        let kind = if *virtual_machine { "a virtual machine" } else { "bare metal" };
        write!(f, "{cpu}, {cpus} CPUs, {memory_gib} GiB, Linux {kernel}, {kind}")
    }
}

/// The first line `name : value`.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let text = "model\t\t: 1\nmodel name\t: A CPU: fast\nMemTotal:   123 kB\n";
        assert_eq!(field(text, "model name"), Some("A CPU: fast"));
        assert_eq!(field(text, "model"), Some("1"));
        assert_eq!(field(text, "MemTotal"), Some("123 kB"));
        assert_eq!(field(text, "flags"), None);
    }
}
