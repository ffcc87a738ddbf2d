"""Result tables: writing and reading them, comparing two, drawing them."""
