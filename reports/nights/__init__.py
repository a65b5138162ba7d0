"""One night against its baseline and the nights before: gate, trends, confirmation, summary, bundle."""
