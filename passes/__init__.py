"""What reads and rewrites graphs: capture, detection, rewriting, verification. One pass per file."""
