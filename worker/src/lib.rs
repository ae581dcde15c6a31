//! 

pub mod session;
