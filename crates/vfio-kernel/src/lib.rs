//! VFIO devices of the Linux kernel.
//!
//! | module | holds |
//! |---|---|
//! | [`raw`] | the uAPI's calls as thin safe functions; all `unsafe` of VFIO is there |

pub mod raw;
