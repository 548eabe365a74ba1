//! headgate-loadtests
