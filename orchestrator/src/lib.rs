//! headgate-orchestrator
