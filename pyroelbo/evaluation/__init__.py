"""Per-datum log probabilities of any pair, by site, and what is refused because no bound follows."""
