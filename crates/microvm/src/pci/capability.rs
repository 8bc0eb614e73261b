//! The capability list of a type 0 configuration space (PCI Local Bus 3.0, section 6.7).

/// Offset of the capability pointer.
const CAPABILITY_POINTER: usize = 0x34;
/// Capabilities start behind the header.
const CAPABILITIES_START: u8 = 0x40;
/// Status bit: there is a capability list.
const STATUS_CAPABILITIES: u8 = 1 << 4;

/// Power management.
pub const ID_PM: u8 = 0x01;
/// MSI.
pub const ID_MSI: u8 = 0x05;
/// PCI Express.
pub const ID_EXPRESS: u8 = 0x10;
/// MSI-X.
pub const ID_MSIX: u8 = 0x11;
/// Advanced features (FLR of conventional PCI).
pub const ID_AF: u8 = 0x13;
/// Enhanced allocation: BARs outside of the BAR registers, which are not emulated.
pub const ID_EA: u8 = 0x14;

/// One entry of the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Capability {
    /// Its id.
    pub id: u8,
    /// Where it starts.
    pub offset: u8,
}

/// Walks the list of `config`. A list that loops or points into the header is refused: the device's
/// configuration space is a claim.
pub fn walk(config: &[u8; 256]) -> Result<Vec<Capability>, String> {
    let mut found: Vec<Capability> = Vec::new();
    if config[6] & STATUS_CAPABILITIES == 0 {
        return Ok(found);
    }
    let mut offset = config[CAPABILITY_POINTER] & !3;
    while offset != 0 {
        if offset < CAPABILITIES_START {
            return Err(format!("a capability at {offset:#x}, inside the header"));
        }
        if found.iter().any(|seen| seen.offset == offset) {
            return Err(format!("the capability list loops at {offset:#x}"));
        }
        let id = config[usize::from(offset)];
        found.push(Capability { id, offset });
        offset = config[usize::from(offset) + 1] & !3;
    }
    Ok(found)
}

/// Takes the capabilities with `id` out of the list.
pub fn hide(config: &mut [u8; 256], id: u8) -> Result<(), String> {
    let list = walk(config)?;
    let mut link = CAPABILITY_POINTER;
    for capability in list {
        let next = usize::from(capability.offset) + 1;
        if capability.id == id {
            config[link] = config[next] & !3;
        } else {
            link = next;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(list: &[(u8, u8)]) -> [u8; 256] {
        let mut config = [0; 256];
        config[6] = STATUS_CAPABILITIES;
        let mut link = CAPABILITY_POINTER;
        for &(id, offset) in list {
            config[link] = offset;
            config[usize::from(offset)] = id;
            link = usize::from(offset) + 1;
        }
        config
    }

    #[test]
    fn the_list_is_walked_in_order() {
        let config = config(&[(ID_MSIX, 0x70), (ID_PM, 0x40), (ID_EXPRESS, 0xfc)]);
        let offsets: Vec<_> = walk(&config).unwrap().iter().map(|c| c.offset).collect();
        assert_eq!(offsets, [0x70, 0x40, 0xfc]);
        assert!(walk(&[0; 256]).unwrap().is_empty());
    }

    #[test]
    fn a_loop_and_a_pointer_into_the_header_are_refused() {
        let mut looped = config(&[(ID_PM, 0x40), (ID_MSI, 0x50)]);
        looped[0x51] = 0x40;
        assert!(walk(&looped).unwrap_err().contains("loops"));
        let mut inside = config(&[(ID_PM, 0x40)]);
        inside[0x41] = 0x10;
        assert!(walk(&inside).unwrap_err().contains("header"));
    }

    #[test]
    fn a_hidden_capability_is_unlinked() {
        for hidden in [0, 1, 2] {
            let list = [(ID_PM, 0x40), (ID_MSI, 0x50), (ID_EXPRESS, 0x60)];
            let mut config = config(&list);
            hide(&mut config, list[hidden].0).unwrap();
            let left: Vec<_> = walk(&config).unwrap().iter().map(|c| c.id).collect();
            let expected: Vec<_> =
                list.iter().enumerate().filter(|(i, _)| *i != hidden).map(|(_, c)| c.0).collect();
            assert_eq!(left, expected);
        }
    }
}
