"""The engine's processes: where model, engine, transceiver and the roles' halves are put together.

`main` is rank 0 of any worker, `follower` each other rank of a model that is spread over several; both join a
`transceiver` to what the engine has. These are the only modules that know both roles.
"""

from pdserve.own_packages import require_own_packages

# Before a module of this package imports one that may be another distribution's.
require_own_packages()
