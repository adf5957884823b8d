"""The page that shows every wait, and the routes that it lives on."""
