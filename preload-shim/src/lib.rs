//! `liblitefs.so`: the preload door. It interposes nothing yet; the FUSE door is the only door today.
