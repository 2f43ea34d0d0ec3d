//! Starting, confining and ending child processes.
