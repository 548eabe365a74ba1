//! headgate-slm
