//! One database.
