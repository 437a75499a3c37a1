"""One decoder block on a card: its time beside torch's and beside what the card can do."""
