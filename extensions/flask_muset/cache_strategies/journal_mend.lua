-- Take what cannot be read out of a key's records, so that others can be accepted behind them.
-- ARGV: place, name.
local now = clock()
begin()
rebuild(ARGV[2], now)
return tidy(ARGV[2], now) and 1 or 0
