"""What happens at each step."""
