-- Let claims that are still held last longer.
-- ARGV: place, microseconds of a lease, then the name and the token of each.
local now = clock()
local ends = now + ARGV[2]
begin()
for index = 3, #ARGV, 2 do
  local key = ARGV[index]
  local state = known(key)
  if state.token == ARGV[index + 1] and is_held(state, now) then
    redis.call('HSET', facts(key), 'ends', ends)
    redis.call('ZADD', DUE, ends, key)
  end
end
return 1
