//! The process guest: threads of this process run the workload on guest memory.
pub mod tracker;
mod uffd;
mod view;
