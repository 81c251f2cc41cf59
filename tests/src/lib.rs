//! Whole-system tests: real `sqlite3`, real agents, real mounts. The harness is here, the tests in `tests/`.
