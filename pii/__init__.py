"""StarPII: find and redact personal data and secrets in code."""
