"""Commands that look on: python -m tools.bench, experiments, export, picture. Nothing else imports them."""
