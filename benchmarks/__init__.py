"""What things cost, measured: each module is a command, prints a table and writes JSON."""
