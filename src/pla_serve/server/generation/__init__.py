"""From prompts to text: tokenising, running sequences, detokenising."""
