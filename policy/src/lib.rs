//! headgate-policy
