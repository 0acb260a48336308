-- End the claims of a call whose answer was lost.
-- ARGV: place, what their tokens begin with, microseconds of a lease.
local now, prefix = clock(), ARGV[2] .. ':'
local keys = redis.call('ZRANGEBYSCORE', DUE, now, now + ARGV[3])
begin()
for _, key in ipairs(keys) do
  local state = known(key)
  if is_held(state, now) and string.sub(state.token, 1, #prefix) == prefix then
    forget_gone(key, state)
    let_go(key)
    if tidy(key, now) then redis.call('ZADD', DUE, now, key) end
  end
end
return #keys
