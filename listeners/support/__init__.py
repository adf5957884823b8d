"""What sources are built of: connections, sharing, decoding, watching. No source is here."""
