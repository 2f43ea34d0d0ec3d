//! The dev server's driver with real children.
