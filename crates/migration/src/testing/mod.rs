//! Tools for tests, behind the feature `testing`: nothing here belongs into a product.

pub mod proxy;
