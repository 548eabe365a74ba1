//! headgate-config
