"""Shape checks as in tests/."""

import checking

checking.install()
