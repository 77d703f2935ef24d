//! Every limit and timeout of the control process that is not the path finder's.
