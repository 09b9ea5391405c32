"""Problems, oracles and programs that the tests share."""
