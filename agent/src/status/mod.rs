//! What an operator sees.
