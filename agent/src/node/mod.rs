//! All databases of one host.
