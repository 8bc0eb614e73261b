//! The KVM guest.
