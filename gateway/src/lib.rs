//! headgate-gateway
