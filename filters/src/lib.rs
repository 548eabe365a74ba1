//! headgate-filters
