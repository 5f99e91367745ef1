"""What puts the function and its bucket up, and takes them down."""
