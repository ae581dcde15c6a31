//! What tests share: where the reference data is, and how to run the program.
