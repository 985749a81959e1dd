"""What tests share: tiny models, problems and their oracle, faulty disks, recorded launches."""
