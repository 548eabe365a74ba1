//! The codecs: bytes in, events out, and back. No I/O; any chunking gives the same events.
