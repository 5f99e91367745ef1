"""What a round takes in time and money, and which plan to take. Nothing below imports this."""
