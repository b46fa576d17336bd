"""How many instances serve which class: pressure, balance and scale."""
