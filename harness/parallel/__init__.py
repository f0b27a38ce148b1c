"""Expert parallelism on several ranks: a kernel on each, dispatch and combine between them, and who is to blame."""
