"""Test helpers: tiny models, loss problems with their oracle, faulty disks, recorded launches."""
