//! headgate-contracts
