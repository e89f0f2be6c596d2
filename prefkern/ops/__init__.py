"""Public ops. Only these know backends; each is one stem in ops/, reference/, csrc/ and tests/."""
