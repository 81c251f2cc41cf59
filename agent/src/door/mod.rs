//! How applications reach their databases.
