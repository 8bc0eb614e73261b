//! Structs and numbers of `linux/vfio.h`, `linux/iommufd.h` (7.2) and the iommufd self-test.
//!
//! Field names are the header's. Sizes are asserted below against the layouts the kernel has.

#![allow(missing_docs)] // the header's own names; its comments are the documentation

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `_IO(';', 100 + n)`.
pub const fn vfio_io(n: u32) -> u32 {
    (b';' as u32) << 8 | (100 + n)
}

/// `_IO(';', 0x80 + n)`: iommufd shares VFIO's type.
pub const fn iommufd_io(n: u32) -> u32 {
    (b';' as u32) << 8 | (0x80 + n)
}

// Container and group.
pub const VFIO_GET_API_VERSION: u32 = vfio_io(0);
pub const VFIO_CHECK_EXTENSION: u32 = vfio_io(1);
pub const VFIO_SET_IOMMU: u32 = vfio_io(2);
pub const VFIO_GROUP_GET_STATUS: u32 = vfio_io(3);
pub const VFIO_GROUP_SET_CONTAINER: u32 = vfio_io(4);
pub const VFIO_GROUP_UNSET_CONTAINER: u32 = vfio_io(5);
pub const VFIO_GROUP_GET_DEVICE_FD: u32 = vfio_io(6);
// Device.
pub const VFIO_DEVICE_GET_INFO: u32 = vfio_io(7);
pub const VFIO_DEVICE_GET_REGION_INFO: u32 = vfio_io(8);
pub const VFIO_DEVICE_GET_IRQ_INFO: u32 = vfio_io(9);
pub const VFIO_DEVICE_SET_IRQS: u32 = vfio_io(10);
pub const VFIO_DEVICE_RESET: u32 = vfio_io(11);
pub const VFIO_DEVICE_FEATURE: u32 = vfio_io(17);
pub const VFIO_DEVICE_BIND_IOMMUFD: u32 = vfio_io(18);
pub const VFIO_DEVICE_ATTACH_IOMMUFD_PT: u32 = vfio_io(19);
pub const VFIO_DEVICE_DETACH_IOMMUFD_PT: u32 = vfio_io(20);
pub const VFIO_MIG_GET_PRECOPY_INFO: u32 = vfio_io(21);
// Type1, on the container.
pub const VFIO_IOMMU_GET_INFO: u32 = vfio_io(12);
pub const VFIO_IOMMU_MAP_DMA: u32 = vfio_io(13);
pub const VFIO_IOMMU_UNMAP_DMA: u32 = vfio_io(14);
pub const VFIO_IOMMU_DIRTY_PAGES: u32 = vfio_io(17);

pub const VFIO_API_VERSION: i32 = 0;
pub const VFIO_TYPE1_IOMMU: u32 = 1;
pub const VFIO_TYPE1V2_IOMMU: u32 = 3;

pub const VFIO_GROUP_FLAGS_VIABLE: u32 = 1 << 0;
pub const VFIO_GROUP_FLAGS_CONTAINER_SET: u32 = 1 << 1;

pub const VFIO_DEVICE_FLAGS_RESET: u32 = 1 << 0;
pub const VFIO_DEVICE_FLAGS_PCI: u32 = 1 << 1;

pub const VFIO_REGION_INFO_FLAG_READ: u32 = 1 << 0;
pub const VFIO_REGION_INFO_FLAG_WRITE: u32 = 1 << 1;
pub const VFIO_REGION_INFO_FLAG_MMAP: u32 = 1 << 2;
pub const VFIO_REGION_INFO_FLAG_CAPS: u32 = 1 << 3;
pub const VFIO_REGION_INFO_CAP_SPARSE_MMAP: u16 = 1;

pub const VFIO_IRQ_INFO_EVENTFD: u32 = 1 << 0;
pub const VFIO_IRQ_INFO_MASKABLE: u32 = 1 << 1;
pub const VFIO_IRQ_INFO_AUTOMASKED: u32 = 1 << 2;
pub const VFIO_IRQ_INFO_NORESIZE: u32 = 1 << 3;

pub const VFIO_IRQ_SET_DATA_NONE: u32 = 1 << 0;
pub const VFIO_IRQ_SET_DATA_BOOL: u32 = 1 << 1;
pub const VFIO_IRQ_SET_DATA_EVENTFD: u32 = 1 << 2;
pub const VFIO_IRQ_SET_ACTION_MASK: u32 = 1 << 3;
pub const VFIO_IRQ_SET_ACTION_UNMASK: u32 = 1 << 4;
pub const VFIO_IRQ_SET_ACTION_TRIGGER: u32 = 1 << 5;

pub const VFIO_DEVICE_FEATURE_MASK: u32 = 0xffff;
pub const VFIO_DEVICE_FEATURE_GET: u32 = 1 << 16;
pub const VFIO_DEVICE_FEATURE_SET: u32 = 1 << 17;
pub const VFIO_DEVICE_FEATURE_PROBE: u32 = 1 << 18;

pub const VFIO_DEVICE_FEATURE_PCI_VF_TOKEN: u16 = 0;
pub const VFIO_DEVICE_FEATURE_MIGRATION: u16 = 1;
pub const VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE: u16 = 2;
pub const VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY: u16 = 3;
pub const VFIO_DEVICE_FEATURE_DMA_LOGGING_START: u16 = 6;
pub const VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP: u16 = 7;
pub const VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT: u16 = 8;
pub const VFIO_DEVICE_FEATURE_MIG_DATA_SIZE: u16 = 9;
pub const VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFO_V2: u16 = 12;

pub const VFIO_IOMMU_INFO_PGSIZES: u32 = 1 << 0;
pub const VFIO_IOMMU_INFO_CAPS: u32 = 1 << 1;
pub const VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE: u16 = 1;
pub const VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION: u16 = 2;
pub const VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL: u16 = 3;

pub const VFIO_DMA_MAP_FLAG_READ: u32 = 1 << 0;
pub const VFIO_DMA_MAP_FLAG_WRITE: u32 = 1 << 1;

pub const VFIO_IOMMU_DIRTY_PAGES_FLAG_START: u32 = 1 << 0;
pub const VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP: u32 = 1 << 1;
pub const VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP: u32 = 1 << 2;

// iommufd.
pub const IOMMU_DESTROY: u32 = iommufd_io(0);
pub const IOMMU_IOAS_ALLOC: u32 = iommufd_io(1);
pub const IOMMU_IOAS_IOVA_RANGES: u32 = iommufd_io(4);
pub const IOMMU_IOAS_MAP: u32 = iommufd_io(5);
pub const IOMMU_IOAS_UNMAP: u32 = iommufd_io(6);
pub const IOMMU_OPTION: u32 = iommufd_io(7);
pub const IOMMU_HWPT_ALLOC: u32 = iommufd_io(9);
pub const IOMMU_GET_HW_INFO: u32 = iommufd_io(0xa);
pub const IOMMU_HWPT_SET_DIRTY_TRACKING: u32 = iommufd_io(0xb);
pub const IOMMU_HWPT_GET_DIRTY_BITMAP: u32 = iommufd_io(0xc);
pub const IOMMU_IOAS_MAP_FILE: u32 = iommufd_io(0xf);
pub const IOMMU_TEST_CMD: u32 = iommufd_io(32);

pub const IOMMU_IOAS_MAP_FIXED_IOVA: u32 = 1 << 0;
pub const IOMMU_IOAS_MAP_WRITEABLE: u32 = 1 << 1;
pub const IOMMU_IOAS_MAP_READABLE: u32 = 1 << 2;

pub const IOMMU_OPTION_HUGE_PAGES: u32 = 1;
pub const IOMMU_OPTION_OP_SET: u16 = 0;

pub const IOMMU_HWPT_ALLOC_DIRTY_TRACKING: u32 = 1 << 1;
pub const IOMMU_HWPT_DIRTY_TRACKING_ENABLE: u32 = 1 << 0;
pub const IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR: u32 = 1 << 0;
pub const IOMMU_HW_CAP_DIRTY_TRACKING: u64 = 1 << 0;

pub const IOMMU_TEST_OP_MOCK_DOMAIN: u32 = 2;
pub const IOMMU_TEST_OP_MOCK_DOMAIN_REPLACE: u32 = 10;
pub const IOMMU_TEST_OP_MOCK_DOMAIN_FLAGS: u32 = 12;
pub const IOMMU_TEST_OP_DIRTY: u32 = 13;
pub const MOCK_APERTURE_START: u64 = 1 << 24;
pub const MOCK_APERTURE_LAST: u64 = (1 << 31) - 1;
pub const MOCK_PAGE_SIZE: u64 = 2048;
pub const MOCK_FLAGS_DEVICE_NO_DIRTY: u32 = 1 << 0;

macro_rules! uapi_structs {
    ($($(#[$doc:meta])* $name:ident, $size:literal { $($field:ident: $type:ty),* $(,)? })*) => { $(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(C)]
        pub struct $name { $(pub $field: $type),* }
        const _: () = assert!(size_of::<$name>() == $size);
    )* };
}

uapi_structs! {
    /// `struct vfio_info_cap_header`.
    CapHeader, 8 { id: u16, version: u16, next: u32 }
    /// `struct vfio_group_status`.
    GroupStatus, 8 { argsz: u32, flags: u32 }
    /// `struct vfio_device_info`.
    DeviceInfo, 24 { argsz: u32, flags: u32, num_regions: u32, num_irqs: u32, cap_offset: u32, pad: u32 }
    /// `struct vfio_region_info`.
    RegionInfo, 32 { argsz: u32, flags: u32, index: u32, cap_offset: u32, size: u64, offset: u64 }
    /// `struct vfio_region_info_cap_sparse_mmap`, without its areas.
    SparseMmapHeader, 16 { header: CapHeader, nr_areas: u32, reserved: u32 }
    /// `struct vfio_region_sparse_mmap_area`.
    SparseMmapArea, 16 { offset: u64, size: u64 }
    /// `struct vfio_irq_info`.
    IrqInfo, 16 { argsz: u32, flags: u32, index: u32, count: u32 }
    /// `struct vfio_irq_set`, without its data.
    IrqSet, 20 { argsz: u32, flags: u32, index: u32, start: u32, count: u32 }
    /// `struct vfio_device_feature`, without its data.
    FeatureHeader, 8 { argsz: u32, flags: u32 }
    /// `struct vfio_device_bind_iommufd`, as kernels before the VF token have it (`argsz` says so).
    BindIommufd, 16 { argsz: u32, flags: u32, iommufd: i32, out_devid: u32 }
    /// `struct vfio_device_attach_iommufd_pt`, as kernels before PASID have it.
    AttachIommufdPt, 12 { argsz: u32, flags: u32, pt_id: u32 }
    /// `struct vfio_device_detach_iommufd_pt`, as kernels before PASID have it.
    DetachIommufdPt, 8 { argsz: u32, flags: u32 }
    /// `struct vfio_device_feature_mig_state`.
    MigState, 8 { device_state: u32, data_fd: i32 }
    /// `struct vfio_precopy_info`.
    PrecopyInfo, 24 { argsz: u32, flags: u32, initial_bytes: u64, dirty_bytes: u64 }
    /// `struct vfio_device_feature_dma_logging_control`.
    DmaLoggingControl, 24 { page_size: u64, num_ranges: u32, reserved: u32, ranges: u64 }
    /// `struct vfio_device_feature_dma_logging_range`.
    DmaLoggingRange, 16 { iova: u64, length: u64 }
    /// `struct vfio_device_feature_dma_logging_report`.
    DmaLoggingReport, 32 { iova: u64, length: u64, page_size: u64, bitmap: u64 }
    /// `struct vfio_iommu_type1_info`.
    Type1Info, 24 { argsz: u32, flags: u32, iova_pgsizes: u64, cap_offset: u32, pad: u32 }
    /// `struct vfio_iommu_type1_info_cap_migration`; the header's `__u64` are aligned to 8.
    Type1CapMigration, 32 {
        header: CapHeader, flags: u32, pad: u32, pgsize_bitmap: u64, max_dirty_bitmap_size: u64,
    }
    /// `struct vfio_iommu_type1_dma_map`.
    Type1DmaMap, 32 { argsz: u32, flags: u32, vaddr: u64, iova: u64, size: u64 }
    /// `struct vfio_iommu_type1_dma_unmap`, without a bitmap.
    Type1DmaUnmap, 24 { argsz: u32, flags: u32, iova: u64, size: u64 }
    /// `struct vfio_iommu_type1_dirty_bitmap`, without its data.
    Type1DirtyBitmap, 8 { argsz: u32, flags: u32 }
    /// `struct vfio_iommu_type1_dirty_bitmap_get` after its header.
    Type1DirtyBitmapGet, 48 {
        head: Type1DirtyBitmap, iova: u64, size: u64, bitmap_pgsize: u64, bitmap_size: u64,
        bitmap_data: u64,
    }
    /// `struct iommu_destroy`.
    IommuDestroy, 8 { size: u32, id: u32 }
    /// `struct iommu_ioas_alloc`.
    IommuIoasAlloc, 12 { size: u32, flags: u32, out_ioas_id: u32 }
    /// `struct iommu_iova_range`; `last` is inclusive.
    IommuIovaRange, 16 { start: u64, last: u64 }
    /// `struct iommu_ioas_iova_ranges`.
    IommuIoasIovaRanges, 32 {
        size: u32, ioas_id: u32, num_iovas: u32, reserved: u32, allowed_iovas: u64,
        out_iova_alignment: u64,
    }
    /// `struct iommu_ioas_map`.
    IommuIoasMap, 40 {
        size: u32, flags: u32, ioas_id: u32, reserved: u32, user_va: u64, length: u64, iova: u64,
    }
    /// `struct iommu_ioas_map_file`.
    IommuIoasMapFile, 40 {
        size: u32, flags: u32, ioas_id: u32, fd: i32, start: u64, length: u64, iova: u64,
    }
    /// `struct iommu_ioas_unmap`.
    IommuIoasUnmap, 24 { size: u32, ioas_id: u32, iova: u64, length: u64 }
    /// `struct iommu_option`.
    IommuOption, 24 {
        size: u32, option_id: u32, op: u16, reserved: u16, object_id: u32, val64: u64,
    }
    /// `struct iommu_hwpt_alloc`.
    IommuHwptAlloc, 48 {
        size: u32, flags: u32, dev_id: u32, pt_id: u32, out_hwpt_id: u32, reserved: u32,
        data_type: u32, data_len: u32, data_uptr: u64, fault_id: u32, reserved2: u32,
    }
    /// `struct iommu_hw_info`, as first released with `out_capabilities`.
    IommuHwInfo, 40 {
        size: u32, flags: u32, dev_id: u32, data_len: u32, data_uptr: u64, out_data_type: u32,
        reserved: u32, out_capabilities: u64,
    }
    /// `struct iommu_hwpt_set_dirty_tracking`.
    IommuHwptSetDirtyTracking, 16 { size: u32, flags: u32, hwpt_id: u32, reserved: u32 }
    /// `struct iommu_hwpt_get_dirty_bitmap`.
    IommuHwptGetDirtyBitmap, 48 {
        size: u32, hwpt_id: u32, flags: u32, reserved: u32, iova: u64, length: u64, page_size: u64,
        data: u64,
    }
    /// `struct iommu_test_cmd` with the widest member of its union that is used here.
    IommuTestCmd, 72 {
        size: u32, op: u32, id: u32, reserved: u32, words: [u32; 12], last: u32, pad: u32,
    }
}
